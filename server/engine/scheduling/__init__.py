"""Scheduling: which sequences the next step computes, and which KV cache blocks and policy table rows they hold."""
