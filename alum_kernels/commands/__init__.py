"""The commands of ``alum-kernels``: a module each, with ``add_arguments(parser)`` and ``run(arguments)``."""
