"""The run configuration: one YAML file, validated, with dotted overrides.

Every field has a default or is required; unknown keys are refused with the nearest valid name. `load_config`
remembers where each value came from, which `nexus-ray config` prints.
"""

from nexus_ray.config.resolve import (
    Resolved,
    SectionT,
    describe_field,
    flatten,
    load_config,
    resolve_config,
    save_config,
)
from nexus_ray.config.schema import STAGES, Config, PretrainRun
from nexus_ray.config.sections import (
    ArchitectureSection,
    CollectSection,
    ConvertSection,
    DataSection,
    EvaluateSection,
    Initialisation,
    ModelSection,
    OptimiserSection,
    PretrainSection,
    ResourcesSection,
    RunSection,
    ScheduleSection,
    Section,
    SelectSection,
    ServeSection,
    SourceSection,
    TargetsSection,
    TrainSection,
    TrainSourceSection,
)

__all__ = [
    "STAGES",
    "ArchitectureSection",
    "CollectSection",
    "Config",
    "ConvertSection",
    "DataSection",
    "EvaluateSection",
    "Initialisation",
    "ModelSection",
    "OptimiserSection",
    "PretrainRun",
    "PretrainSection",
    "Resolved",
    "ResourcesSection",
    "RunSection",
    "ScheduleSection",
    "Section",
    "SectionT",
    "SelectSection",
    "ServeSection",
    "SourceSection",
    "TargetsSection",
    "TrainSection",
    "TrainSourceSection",
    "describe_field",
    "flatten",
    "load_config",
    "resolve_config",
    "save_config",
]
