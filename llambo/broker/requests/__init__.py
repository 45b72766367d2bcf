"""The life of a request: admission, refusals, dispatch, delivery, end, who follows it, a broker that was lost."""
