"""Messages on disk that Kafka has not taken: `records` in `segments`, a `writer` while the daemon runs, and the
`replay` at the next start."""
