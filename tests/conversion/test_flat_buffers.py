# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The layout of Megatron's flat buffers, by hand. That megatron-core has the same is in test_megatron_adam.py."""

import pytest

from conversion.native.flat_buffers import lay_out, lay_out_in
from conversion.native.megatron_optimizer import bucket_elements

SIZES = (32, 1000, 48, 64)


def test_every_parameter_begins_at_a_multiple_of_64():
    layout = lay_out(SIZES)
    assert layout.places == ((0, 0, 32), (0, 64, 1064), (0, 1088, 1136), (0, 1152, 1216))
    assert (layout.buckets, layout.ranges()) == ((1216,), [(0, 32), (64, 1064), (1088, 1136), (1152, 1216)])


def test_a_bucket_ends_with_the_parameter_that_fills_it():
    layout = lay_out(SIZES, bucket_size=1000)
    assert layout.places == ((0, 0, 32), (0, 64, 1064), (1, 0, 48), (1, 64, 128))
    assert (layout.buckets, layout.ranges()[2:]) == ((1064, 128), [(1064, 1112), (1128, 1192)])


def test_a_shared_embedding_has_a_bucket_of_its_own():
    layout = lay_out(SIZES, alone={2})
    assert layout.places == ((0, 0, 32), (0, 64, 1064), (1, 0, 48), (2, 0, 64))
    assert layout.buckets == (1088, 48, 64)  # the first with what would have been before the next parameter
    assert lay_out(SIZES, alone={0}).buckets == (32, 1152)


@pytest.mark.parametrize("options", [{}, {"bucket_size": 1000}, {"bucket_size": 1}, {"alone": {2}}, {"alone": {0, 3}}])
def test_buckets_of_known_sizes(options):
    layout = lay_out(SIZES, **options)
    assert lay_out_in(SIZES, layout.buckets, alone=options.get("alone", ())) == layout


@pytest.mark.parametrize("buckets", [(), (1215,), (1064, 64), (1064, 128, 64), (32, 1000, 48, 60)])
def test_buckets_that_do_not_fit(buckets):
    assert lay_out_in(SIZES, buckets) is None


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, None),
        ({"overlap_grad_reduce": False, "ddp_bucket_size": 7}, None),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": 7}, 7),
        ({"overlap_grad_reduce": True, "ddp_num_buckets": 4}, 25),
        ({"overlap_grad_reduce": True, "data_parallel_size": 8}, 40_000_000),
        ({"overlap_grad_reduce": True, "world_size": 512, "tensor_model_parallel_size": 4}, 128_000_000),
        ({"overlap_grad_reduce": True, "overlap_param_gather_with_optimizer_step": True}, None),
    ],
)
def test_the_size_of_a_bucket_by_the_arguments(args, expected):
    assert bucket_elements(args, 100) == expected
