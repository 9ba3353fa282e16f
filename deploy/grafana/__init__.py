"""Grafana dashboards as code, and the files by which Grafana loads them."""
