"""Jobs on disk: journal, checkpoint, queue order, outbox. Knows nothing of MQTT."""
