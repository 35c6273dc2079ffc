"""Ways into other libraries, imported only when asked for."""
