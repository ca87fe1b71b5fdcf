"""The service's metrics for Prometheus, by prometheus_client."""
