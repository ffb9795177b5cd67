// libop_common.so: programs link against it, and call nothing of it.
