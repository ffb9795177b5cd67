from evenmoe.cli import main

main()
