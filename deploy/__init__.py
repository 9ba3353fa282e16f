"""What stands around a running server: metrics page, Prometheus rules, Grafana dashboards, Helm chart, deployment on Ray,
and the documentation site. Not part of the distribution."""
