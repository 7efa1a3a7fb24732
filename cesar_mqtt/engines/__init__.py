"""Queues that consumers on many machines share. nats-py stops here."""
