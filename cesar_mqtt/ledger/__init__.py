"""Jobs on disk: on return of a method that changes something, the change is on disk.

TinyDB stops here. Of MQTT this package knows only the packet id, as a number.
"""
