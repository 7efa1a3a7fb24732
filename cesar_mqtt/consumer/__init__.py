"""The threads of the consumer: intake, worker, publisher, and what they share."""
