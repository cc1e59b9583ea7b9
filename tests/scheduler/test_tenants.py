"""What a tenant leaves to others, now and by the time that it is told to come back."""

from shardline_scheduler.tenants import Reserve, Tenants


def busy_and_idle() -> Tenants:
    """Somebody is promised two requests, and another tenant has just asked for one."""
    tenants = Tenants()
    for name in ("busy", "busy", "idle"):
        tenants.ask(name, 0.0, prefill_s=1.0, stay_s=1.0)
    for _ in range(2):
        tenants.queue("busy", 10.0, is_promised=True)
    return tenants


def test_the_first_request_of_a_tenant_may_have_all():
    assert busy_and_idle().reserve("idle", 0.0) == Reserve()
    assert busy_and_idle().reserve_later("idle", 1.0, []) == Reserve()


def test_a_tenant_with_more_than_its_part_leaves_others_theirs():
    reserve = busy_and_idle().reserve("busy", 0.0)
    assert reserve.num_requests == 2 and reserve.prefill_share > 0


def test_a_guest_who_may_be_promised_something_by_then_is_the_first_of_his_tenant():
    """Who is told when to come back would else be sent away again, for the shares of others."""
    told = busy_and_idle().reserve_later("idle", 1.0, ["idle"])
    tenants = busy_and_idle()
    tenants.queue("idle", 10.0, is_promised=False)
    tenants.begin_promise("idle")
    for _ in range(2):
        tenants.end_promise("busy")
    then = tenants.reserve("idle", 1.0)
    assert then.num_requests > 0 and then.prefill_share > 0
    assert told.num_requests >= then.num_requests
    assert told.prefill_share >= then.prefill_share
