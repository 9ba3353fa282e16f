"""An open-loop load test of a server over HTTP: arrivals, requests, one client, figures, a page."""
