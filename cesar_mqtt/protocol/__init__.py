"""The public contract as models: bytes in, a model or a `Refusal` out; a model in, bytes of at most N out.

No I/O, no threads, nothing of MQTT clients or the ledger. A field that is not in here is not in the contract.
"""
