"""Builds the application for Ray Serve: `serve run deploy.ray.app:build model=PATH`.

Ray Serve's HTTP proxy ─► Gateway ─► Replica, Replica, ...  each a whole server
                                        └──► ViewHolder     one policy view for all
"""

from typing import Any

from deploy.ray.config import DeploymentConfig

EXTRA_REQUESTS = 32  # besides completions: the model list, tokens, the page
NO_LIMIT = 100_000
HEALTH_SECONDS = 5.0


def build(config: DeploymentConfig) -> Any:
    """The application. Raises ValueError for settings that cannot be served, ImportError if Ray Serve is not installed."""
    try:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
    except ImportError as error:
        raise ImportError("the deployment needs Ray Serve: pip install 'ladimo[ray]'") from error
    from deploy.ray.actors import ReplicaActor, ViewHolder, gateway_app

    settings = config.settings()
    max_body_bytes = settings.max_body_bytes
    size: dict[str, Any] = {"num_replicas": config.replicas}
    if config.autoscaling is not None:
        policy = AutoscalingPolicy(policy_function="deploy.ray.autoscaling:desired_replicas")
        usual = {"target_ongoing_requests": settings.max_num_seqs, "policy": policy}
        size = {"autoscaling_config": AutoscalingConfig(**{**usual, **config.autoscaling})}
    router = RequestRouterConfig(
        request_router_class="deploy.ray.router.PrefixRouter", request_router_kwargs={"balance": config.balance}
    )
    quiet = {"enable_access_log": False}  # the servers have their own
    holder = serve.deployment(
        ViewHolder,
        name="ViewHolder",
        max_ongoing_requests=NO_LIMIT,  # each replica's call waits for news
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=1,
        logging_config=quiet,
    )
    replica = serve.deployment(
        ReplicaActor,
        name="Replica",
        max_ongoing_requests=settings.max_num_seqs + settings.max_queue + EXTRA_REQUESTS,  # the server itself answers 429
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
        logging_config=quiet,
        health_check_period_s=HEALTH_SECONDS,
        request_router_config=router,
        **size,
    )
    gateway = serve.deployment(
        serve.ingress(lambda: gateway_app("Replica", max_body_bytes))(),
        name="Gateway",
        num_replicas=config.gateways,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
        logging_config=quiet,
    )
    return gateway.bind(replica.bind(config, holder.bind()))
