"""What HTTP needs around the APIs: origins, timeouts, request ids, WebSockets, the OpenAPI document."""
