"""The options of this program's tasks: one module a task, with ``add(parser)`` and ``check(args)``.

Torch is not imported here, so that ``--help`` and errors of the command line are immediate.
"""
