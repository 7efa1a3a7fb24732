"""The connection to a broker, in MQTT's own words: delivery, subscription, will, session, packet id, in flight.

paho and amqtt stop here: no other package imports them.
"""
