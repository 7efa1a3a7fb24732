"""Health, Prometheus metrics, systemd notification and signals; only `service` and the command line depend on these."""
