"""The client: what a program calls to use a mesh. Gateway, bridge, fleet and commands use it as well."""
