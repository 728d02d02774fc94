"""Events through NATS JetStream: the sink that publishes them, and the readers of what it published."""
