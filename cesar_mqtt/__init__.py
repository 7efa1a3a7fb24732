"""Cesar on a message bus: jobs come in over MQTT, transcripts go out as retained status messages.

The life of a job in seven stops, each with the function to read first:

1. `mqtt.connection.Connection.run_once`: a PUBLISH is read; the `Delivery` goes into the
   `mqtt.receive_buffer.ReceiveBuffer`. Nothing else happens on the network thread.
2. `consumer.intake.Intake.run_once`: takes all waiting deliveries; `protocol.parsing.parse_submission` makes a request
   or a `Refusal` of each, and `ledger.spool.Spool.store` writes uploaded audio to disk.
3. `ledger.ledger.Ledger.append`: one journal line and one fsync for all accepted jobs. Only then does
   `mqtt.client.MqttClient.acknowledge` send the PUBACKs, in order.
4. `consumer.worker.Worker.run_once`: claims the oldest ready job, on disk, with its recording from
   `consumer.prefetch.Prefetcher`.
5. `whisper.transcriber.Transcriber.transcribe`: window by window; each finished window is a checkpoint in the ledger.
6. `ledger.ledger.Ledger.complete`: the result is on disk, and the outbox has a pending status.
7. `consumer.publisher.Publisher.run_once`: publishes results, event and retained status; at the PUBACK the ledger
   marks the status as published.

Packages import downward only: `cli`, `service`, `gateway`, `consumer` and `monitoring`, `whisper`, then `audio`, `mqtt`
and `ledger`, which do not import each other, `protocol`, and the modules beside this file. `service` wires the parts
and stops them in order.
"""

__version__: str


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import version  # noqa: PLC0415 - takes hundredths of a second, which few commands need

    globals()[name] = found = version("cesar-mqtt")
    return found
