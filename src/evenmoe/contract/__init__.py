"""What each operator accepts: checks on shapes, dtypes and attributes alone, in the documented order."""
