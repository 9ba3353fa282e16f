"""What stands around a running server: its metrics page, Prometheus rules, Grafana dashboards and Helm chart, and the
documentation site. Not part of the distribution."""
