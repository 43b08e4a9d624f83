"""What server and participant say to each other over gRPC: the schema, its messages, its errors."""
