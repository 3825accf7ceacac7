"""The whole system on one machine: `run` joins a daemon, clients and a consumer (`arrivals`); `view` shows it."""
