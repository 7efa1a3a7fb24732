"""The connection to a broker; paho and amqtt stop here."""
