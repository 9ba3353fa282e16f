"""The wire: what request bodies look like."""
