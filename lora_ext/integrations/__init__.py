"""Our operation inside other libraries: a module each, which alone imports that library."""
