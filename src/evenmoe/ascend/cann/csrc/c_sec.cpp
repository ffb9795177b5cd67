// libc_sec.so: programs link against it, and call nothing of it.
