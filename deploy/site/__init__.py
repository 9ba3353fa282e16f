"""The documentation site: pages from docs/ and elsewhere, and pages made from the code and from committed results."""
