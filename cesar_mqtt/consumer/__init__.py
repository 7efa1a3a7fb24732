"""The threads of the consumer: intake, worker, publisher, prefetch. Each module names its thread in its first lines."""
