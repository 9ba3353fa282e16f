"""What stands around a running server: its metrics page, Prometheus rules, Grafana dashboards. Not part of the distribution."""
