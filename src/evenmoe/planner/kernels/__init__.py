"""What the planners compile: serial, arrays in and arrays out, without the interpreter's lock."""
