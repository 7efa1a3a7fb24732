"""The front doors: clients of the bus that serve people and programs which do not speak MQTT."""
