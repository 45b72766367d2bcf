"""Who may connect, by key and role (zap_handler), and what an identity may ask (permissions; sessions: core)."""
