"""The fields of KubeRay's `ray.io/v1` objects as JSON Schema, closed: a misspelt field is an error.

Names and types are those of KubeRay's API reference, release 1.7; pods are left to Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_BOOL: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number", "minimum": 0}
_ANY: Schema = {"type": "object"}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}
POD: Schema = {"type": "object", "required": ["spec"]}


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _enum(*values: str) -> Schema:
    return {"enum": list(values)}


_HEAD = _object(
    {
        "enableIngress": _BOOL,
        "headService": _ANY,
        "ingressOptions": _ANY,
        "labels": _TEXTS,
        "rayStartParams": _TEXTS,
        "resources": _TEXTS,
        "serviceType": _TEXT,
        "template": POD,
    },
    "template",
)
_WORKERS = _object(
    {
        "groupName": _TEXT,
        "idleTimeoutSeconds": _COUNT,
        "labels": _TEXTS,
        "maxReplicas": _COUNT,
        "minReplicas": _COUNT,
        "numOfHosts": _COUNT,
        "priority": {"type": "integer"},
        "rayStartParams": _TEXTS,
        "replicas": _COUNT,
        "resources": _TEXTS,
        "scaleStrategy": _ANY,
        "suspend": _BOOL,
        "template": POD,
    },
    "groupName",
    "maxReplicas",
    "minReplicas",
    "template",
)
_AUTOSCALER = _object(
    {
        "args": {"type": "array"},
        "command": {"type": "array"},
        "env": {"type": "array"},
        "envFrom": {"type": "array"},
        "idleTimeoutSeconds": _COUNT,
        "image": _TEXT,
        "imagePullPolicy": _TEXT,
        "resources": _ANY,
        "securityContext": _ANY,
        "upscalingMode": _enum("Default", "Aggressive", "Conservative"),
        "version": _enum("v1", "v2"),
        "volumeMounts": {"type": "array"},
    }
)
CLUSTER = _object(
    {
        "authOptions": _object({"enableK8sTokenAuth": _BOOL, "mode": _enum("disabled", "token"), "secretName": _TEXT}),
        "autoscalerOptions": _AUTOSCALER,
        "enableInTreeAutoscaling": _BOOL,
        "gcsFaultToleranceOptions": _ANY,
        "headGroupSpec": _HEAD,
        "headServiceAnnotations": _TEXTS,
        "historyServerOptions": _ANY,
        "managedBy": _TEXT,
        "networkPolicy": _ANY,
        "rayVersion": _TEXT,
        "suspend": _BOOL,
        "tlsOptions": _ANY,
        "upgradeStrategy": _ANY,
        "workerGroupSpecs": {"type": "array", "items": _WORKERS},
    },
    "headGroupSpec",
)
JOB = _object(
    {
        "activeDeadlineSeconds": _COUNT,
        "backoffLimit": _COUNT,
        "clusterSelector": _TEXTS,
        "deletionStrategy": _ANY,
        "entrypoint": _TEXT,
        "entrypointNumCpus": _NUMBER,
        "entrypointNumGpus": _NUMBER,
        "entrypointResources": _TEXT,
        "jobId": _TEXT,
        "managedBy": _TEXT,
        "metadata": _TEXTS,
        "preRunningDeadlineSeconds": _COUNT,
        "rayClusterSpec": CLUSTER,
        "runtimeEnvYAML": _TEXT,
        "shutdownAfterJobFinishes": _BOOL,
        "submissionMode": _enum("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "submitterConfig": _object({"backoffLimit": _COUNT}),
        "submitterPodTemplate": POD,
        "suspend": _BOOL,
        "ttlSecondsAfterFinished": _COUNT,
    }
)
SERVICE = _object(
    {
        "deploymentUnhealthySecondThreshold": _COUNT,
        "excludeHeadPodFromServeSvc": _BOOL,
        "managedBy": _TEXT,
        "rayClusterConfig": CLUSTER,
        "rayClusterDeletionDelaySeconds": _COUNT,
        "serveConfigV2": _TEXT,
        "serveService": _ANY,
        "serviceUnhealthySecondThreshold": _COUNT,
        "suspend": _BOOL,
        "upgradeStrategy": _ANY,
    },
    "rayClusterConfig",
)
OF_KIND = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}
