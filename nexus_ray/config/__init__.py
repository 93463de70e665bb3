"""The run configuration: one YAML file, validated, with dotted overrides.

Every field has a default or is required; unknown keys are refused with the nearest valid name. `load_config`
remembers where each value came from, which `nexus-ray config` prints.
"""

from nexus_ray.config.base import Section
from nexus_ray.config.planning import PlanSection
from nexus_ray.config.resolve import (
    Resolved,
    SectionT,
    describe_field,
    flatten,
    flatten_values,
    load_config,
    resolve_config,
    save_config,
)
from nexus_ray.config.resources import ResourcesSection, ResourceStage
from nexus_ray.config.scheduled import Scheduled
from nexus_ray.config.schema import STAGES, Config, PretrainRun
from nexus_ray.config.sections import (
    ArchitectureSection,
    Attention,
    CollectSection,
    ContinuationsSection,
    ConvertSection,
    DataSection,
    EvaluateSection,
    Initialisation,
    LmEvalSection,
    ModelSection,
    Predict,
    PretrainSection,
    RunSection,
    SelectSection,
    SourceSection,
    TargetsSection,
)
from nexus_ray.config.serving import ServeSection
from nexus_ray.config.training import (
    LOSSES,
    AveragingSection,
    EarlyStopSection,
    OptimiserSection,
    RoutersSection,
    SamplesSection,
    ScheduleSection,
    TrackersSection,
    TrainSection,
    TrainSourceSection,
    WarningsSection,
)

__all__ = [
    "LOSSES",
    "STAGES",
    "ArchitectureSection",
    "Attention",
    "AveragingSection",
    "CollectSection",
    "Config",
    "ContinuationsSection",
    "ConvertSection",
    "DataSection",
    "EarlyStopSection",
    "EvaluateSection",
    "Initialisation",
    "LmEvalSection",
    "ModelSection",
    "OptimiserSection",
    "PlanSection",
    "Predict",
    "PretrainRun",
    "PretrainSection",
    "Resolved",
    "ResourceStage",
    "ResourcesSection",
    "RoutersSection",
    "RunSection",
    "SamplesSection",
    "ScheduleSection",
    "Scheduled",
    "Section",
    "SectionT",
    "SelectSection",
    "ServeSection",
    "SourceSection",
    "TargetsSection",
    "TrackersSection",
    "TrainSection",
    "TrainSourceSection",
    "WarningsSection",
    "describe_field",
    "flatten",
    "flatten_values",
    "load_config",
    "resolve_config",
    "save_config",
]
