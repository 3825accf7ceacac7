"""The way out, in the order a message takes it.

`delivery` queues it, with a `Lane` that remembers whose it is, and moves it through the books when Kafka has
answered; `deadletter` is where what cannot be routed goes; `producer` is confluent-kafka's producer, its polling and
what it knows of the cluster; `embedded` is a Kafka inside the process for trials and tests.
"""
