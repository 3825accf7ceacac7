"""The way out, in the order a message takes it.

`delivery` queues it, `inflight` remembers it, in its session's `Lane`, and moves it through the books when Kafka has
answered; `producer` is confluent-kafka's producer, its polling, its replacement, and what it knows of the cluster;
`failures` says whose fault a failed record is, `parking` keeps apart what waits for a partition that takes nothing;
`deadletter` is where what cannot be routed goes; what Kafka does not take at all goes to the `spool` on disk, by way of
`spooling`, which also sends it again at the next start. `embedded` is a Kafka inside the process for trials and tests.
"""
