"""Random sequences of arrivals and aborts on a real engine, checked at every step."""


def play(engine, rng, questions):
    """Play one random sequence; return what was asked, answered and aborted."""
    if rng.random() < 0.3:
        engine.llm.reset_prefix_cache()
    asked, answers, dropped = {}, {}, set()
    arrivals = sorted(rng.randrange(12) for _ in range(rng.randint(2, 6)))
    step = 0
    while arrivals or len(answers) + len(dropped) < len(asked):
        while arrivals and arrivals[0] <= step:
            arrivals.pop(0)
            request_id = f"{len(asked)}"
            asked[request_id] = rng.choice(questions)
            engine.add(request_id, asked[request_id])
        live = sorted(set(asked) - set(answers) - dropped)
        if live and rng.random() < 0.03:
            victim = rng.choice(live)
            dropped.add(victim)
            engine.abort(victim)
        engine.poison_free_blocks()
        answers |= {k: v for k, v in engine.step().items() if k not in dropped}
        engine.check_integrity()
        step += 1
    engine.step()
    engine.check_integrity()
    return asked, answers, dropped
