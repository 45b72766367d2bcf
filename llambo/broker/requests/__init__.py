"""The life of a request: admission and its refusals, dispatch, delivery, end, who follows it, and a broker that was lost."""
