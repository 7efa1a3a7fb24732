"""The command line: the only package that prints.

Client commands use `mqtt` and `protocol`; `serve` and `demo` use `service`.
"""
