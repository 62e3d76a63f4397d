# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""TeleFLM and stock Llama as cases of transformers' common model tests. Run by test_transformers_suite.py.

Here `tests` is transformers' package of that name. A checkout has all of it. The source distribution has the common and
the training tests, and lacks those of generation, export and distribution.
"""

import importlib.util
import sys
import types
import unittest

from transformers import LlamaConfig
from transformers.models.auto import modeling_auto
from transformers.models.llama import modeling_llama
from transformers.testing_utils import _TEXT_MODEL_TESTER_DEFAULTS

import modeling_teleflm

HEADS = {
    "base_model_class": ("Model", "MODEL_MAPPING_NAMES"),
    "causal_lm_class": ("ForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "question_answering_class": ("ForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    "sequence_classification_class": ("ForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "token_classification_class": ("ForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
}

# The suite tells heads apart by these tables of names, which registering a class does not extend.
for suffix, table in HEADS.values():
    getattr(modeling_auto, table)["TeleFLM"] = f"TeleFLM{suffix}"

if importlib.util.find_spec("tests.causal_lm_tester"):
    from tests import test_fsdp_mixin
    from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester

    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES.add("TeleFLM")
else:
    # Empty classes stand in for what the source distribution imports but does not contain.
    for module, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        sys.modules[f"tests.{module}"] = types.ModuleType(module)
        setattr(sys.modules[f"tests.{module}"], mixin, type(mixin, (), {}))
    from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
    from tests.test_training_mixin import TrainingTesterMixin

    class CausalLMModelTester:
        """The inputs and the configuration of the tests, as much as they ask for."""

        def __init__(self, test):
            vars(self).update(_TEXT_MODEL_TESTER_DEFAULTS)
            self.all_model_classes = tuple(getattr(self, head) for head in HEADS)

        def get_config(self):
            fields = {name: getattr(self, name) for name in dir(self.config_class) if name in dir(self)}
            return self.config_class(**{name: value for name, value in fields.items() if not name.startswith("_")})

        def prepare_config_and_inputs_for_common(self):
            input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            return self.get_config(), {
                "input_ids": input_ids,
                "attention_mask": input_ids.new_ones(input_ids.shape).tril(),
            }

    class CausalLMModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
        def setUp(self):
            self.model_tester = self.model_tester_class(self)
            self.all_model_classes = self.model_tester.all_model_classes


def build_tester(prefix, module, config_class, **fields):
    classes = {head: getattr(module, f"{prefix}{suffix}") for head, (suffix, _) in HEADS.items()}
    return type(f"{prefix}Tester", (CausalLMModelTester,), {"config_class": config_class, **classes, **fields})


class LlamaTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = build_tester("Llama", modeling_llama, LlamaConfig)
    # As in transformers' own test of Llama.
    model_split_percents = [0.5, 0.7, 0.8]
    _torch_compile_train_cls = modeling_llama.LlamaForCausalLM


class TeleFLMTest(CausalLMModelTest, unittest.TestCase):
    multipliers = {"use_mup": True, "input_mult": 1.5, "output_mult": 3.0, "mup_scale_factor": 2.0}
    model_tester_class = build_tester("TeleFLM", modeling_teleflm, modeling_teleflm.TeleFLMConfig, **multipliers)
    model_split_percents = LlamaTest.model_split_percents
    _torch_compile_train_cls = modeling_teleflm.TeleFLMForCausalLM
