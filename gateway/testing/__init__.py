"""For tests, benches, the demo, and users' own tests: none of it belongs to a daemon.

`daemon` starts a real one, `kafka` an Apache Kafka, `devkeys` makes keys and certificates, `rawclient` sends exactly
what a test wants, `records` reads what arrived, `figures` sums up samples.
"""
