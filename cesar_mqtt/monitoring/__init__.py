"""Health, Prometheus metrics, systemd notification, signals."""
