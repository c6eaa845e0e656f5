//! `step`: one pass equals the three operations; shards; golden bits.

use gradblend::{Cadence, Config, DType, Pass, bf16, f16};
use gradblend_testkit::{
    Face, Input, Outcome, Output, Random, Result, Sample, Sums, Tensor, TestBlender, bits, bits64, rejected, version_1,
};

gradblend_testkit::tests! {
    each_dtype:
        step_is_dot_blend_observe,
        threads_change_no_bit,
        alignment_changes_no_bit,
        permuting_modalities_permutes_weights,
        released_and_updated;
    once:
        shards_add_their_pending_sums,
        golden_bits;
    host:
        addresses_do_what_slices_do;
}

fn some_tensors<T: Sample>(random: &mut Random, k: usize) -> Vec<Tensor<T>> {
    (0..12).map(|i| Tensor::random(random, [0, 1, 700, 70_000][i % 4], k, i % 3, 4)).collect()
}

fn step_is_dot_blend_observe<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(21);
    for cadence in [Cadence::OnRequest, Cadence::EveryObservation] {
        for (k, rounds) in [(1, 4), (3, 4), (4, 4), (6, 2), (9, 2), (12, 2)] {
            let config = Config { cadence, ..Config::new(k as u32) };
            let (mut one, mut three) = (face.blender_with(config)?, face.blender_with(config)?);
            for _ in 0..rounds {
                let mut fused = some_tensors::<T>(&mut random, k);
                for (i, tensor) in fused.iter_mut().enumerate() {
                    tensor.has_products = i % 6 != 5;
                    // In place too, where the modality is present.
                    let modality = random.below(k);
                    if i % 2 == 1 && tensor.modalities[modality].is_some() {
                        tensor.output = Output::InPlace(modality);
                    }
                }
                let mut separate = fused.clone();
                face.run(&mut one, &mut fused, TestBlender::step)?;
                face.run(&mut three, &mut separate, |blender, plan| {
                    blender.dot(plan)?;
                    blender.blend(plan)?;
                    blender.observe()
                })?;
                for (fused, separate) in fused.iter().zip(&separate) {
                    assert_eq!(bits(fused.written()), bits(separate.written()), "K = {k}");
                }
                assert_eq!(one.save()?, three.save()?, "K = {k}");
            }
            assert_eq!(one.report()?.skipped, 0);
        }
    }
    Ok(())
}

/// The blend and the saved state after a step.
fn step<T: Sample>(face: Face, config: Config, tensors: &[Tensor<T>]) -> Result<(Vec<Vec<u32>>, Vec<u8>)> {
    let mut blender = face.blender_with(config)?;
    let mut tensors = tensors.to_vec();
    face.run(&mut blender, &mut tensors, TestBlender::step)?;
    Ok((tensors.iter().map(|tensor| bits(&tensor.blended)).collect(), blender.save()?))
}

/// On a CUDA device, which has no thread count to choose, repeated runs give the same bits.
fn threads_change_no_bit<T: Sample>(face: Face) -> Outcome {
    let tensors = some_tensors::<T>(&mut Random(22), 5);
    let config = Config::new(5);
    let want = step(face, Config { threads: 1, ..config }, &tensors)?;
    for threads in [0, 2, 5] {
        assert_eq!(step(face, Config { threads, ..config }, &tensors)?, want, "{threads} threads");
    }
    Ok(())
}

fn alignment_changes_no_bit<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(27);
    let config = Config { threads: 2, ..Config::new(9) };
    let aligned: Vec<Tensor<T>> = [70_000, 8000, 33].map(|len| Tensor::random(&mut random, len, 9, 0, 0)).into();
    let want = step(face, config, &aligned)?;
    for _ in 0..4 {
        let scattered: Vec<Tensor<T>> = aligned.iter().map(|tensor| tensor.scattered(&mut random)).collect();
        assert_eq!(step(face, config, &scattered)?, want);
    }
    Ok(())
}

fn permuting_modalities_permutes_weights<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(23);
    let order = [2, 0, 3, 1];
    let (mut straight, mut permuted) = (face.blender(4)?, face.blender(4)?);
    for _ in 0..6 {
        let mut tensors = [Tensor::<T>::random(&mut random, 2000, 4, 0, 0)];
        let mut others = tensors.clone();
        others[0].modalities = order.iter().map(|k| tensors[0].modalities[*k].clone()).collect();
        face.run(&mut straight, &mut tensors, TestBlender::step)?;
        face.run(&mut permuted, &mut others, TestBlender::step)?;
    }
    straight.reweight()?;
    permuted.reweight()?;
    let (straight, permuted) = (straight.report()?, permuted.report()?);
    for (k, from) in order.into_iter().enumerate() {
        assert_eq!(permuted.mean[k], straight.mean[from]);
        assert_eq!(permuted.second_moment[k], straight.second_moment[from]);
        assert!((permuted.weights[k] - straight.weights[from]).abs() < 1e-14);
    }
    Ok(())
}

/// A loop that reads `blended` between steps: release returns the slices, update binds others.
fn released_and_updated<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(24);
    let (mut reused, mut fresh) = (face.blender(2)?, face.blender(2)?);
    let mut released = None;
    for round in 0..4 {
        let mut tensors: Vec<Tensor<T>> = (0..3).map(|i| Tensor::random(&mut random, 500 * i, 2, round, 2)).collect();
        let mut twins = tensors.clone();
        let mut uploaded = face.upload(&mut tensors);
        let plan = match released.take() {
            None => reused.plan(uploaded.inputs())?,
            Some(mut plan) => {
                if !face.c {
                    rejected(reused.step(&plan), &gradblend::Error::ReleasedPlan, "update it");
                }
                plan.update(uploaded.inputs(), reused.stream)?;
                plan
            }
        };
        reused.step(&plan)?;
        released = Some(plan.release());
        uploaded.fetch();
        face.run(&mut fresh, &mut twins, TestBlender::step)?;
        for (tensor, twin) in tensors.iter().zip(&twins) {
            assert_eq!(bits(&tensor.blended), bits(&twin.blended));
        }
    }
    assert_eq!(reused.save()?, fresh.save()?);
    Ok(())
}

fn addresses_do_what_slices_do(face: Face) -> Outcome {
    let mut random = Random(25);
    let mut tensors = [Tensor::<f32>::random(&mut random, 3000, 3, 1, 0)];
    tensors[0].modalities[1] = None;
    let mut twin = tensors[0].clone();
    let (mut slices, mut raw) = (face.blender(3)?, face.blender(3)?);
    face.run(&mut slices, &mut tensors, TestBlender::step)?;
    let at = |buffer: &[f32]| buffer.as_ptr().expose_provenance();
    let v: Vec<usize> = twin.modalities.iter().map(|v| v.as_deref().map_or(0, at)).collect();
    let (train, valid, blended) = (at(&twin.train), at(&twin.valid), twin.blended.as_mut_ptr().expose_provenance());
    // SAFETY: 3,000 elements in each buffer, live and untouched until the plan is dropped.
    let plan = raw.plan(vec![unsafe { Input::at(3000, DType::F32, train, valid, &v, blended) }])?;
    raw.step(&plan)?;
    drop(plan);
    assert_eq!(bits(&twin.blended), bits(&tensors[0].blended));
    assert_eq!(raw.save()?, slices.save()?);
    Ok(())
}

/// A sharded trainer: each shard runs DOT + BLEND, the pending sums are added up, then observed.
fn shards_add_their_pending_sums(face: Face) -> Outcome {
    let mut random = Random(26);
    let mut tensors: Vec<Tensor<f32>> = (0..4).map(|_| Tensor::random(&mut random, 3000, 2, 0, 0)).collect();
    let (mut first, mut second) = (face.blender(2)?, face.blender(2)?);
    for (blender, shard) in [&mut first, &mut second].into_iter().zip(tensors.chunks_mut(2)) {
        face.run(blender, shard, |blender, plan| blender.pass(plan, Pass::DOT | Pass::BLEND))?;
    }
    let sums: Vec<f64> = first.pending()?.iter().zip(second.pending()?).map(|(a, b)| a + b).collect();
    first.observe_sums(&sums[..2], &sums[2..])?;
    Sums::of(2, &tensors).check(&sums, "two shards");
    assert_eq!(first.report()?.mean, sums[..2]);
    Ok(())
}

/// Fixed inputs, exact output bits. A change here is a change of results that users must be told of.
/// Saved states are compared in the form of version 1.
fn golden_bits(face: Face) -> Outcome {
    fn run<T: Sample>(face: Face) -> Result<Golden> {
        let mut random = Random(2020);
        let mut tensors: Vec<Tensor<T>> =
            [(1, 0), (1000, 1), (65_537, 2)].map(|(len, offset)| Tensor::random(&mut random, len, 3, offset, 0)).into();
        tensors[1].modalities[1] = None;
        let mut blender = face.blender(3)?;
        blender.set_weights(&[0.5, 0.3, 0.2])?;
        face.run(&mut blender, &mut tensors, |blender, plan| blender.pass(plan, Pass::DOT | Pass::BLEND))?;
        let sums = bits64(&blender.pending()?).try_into().unwrap_or_default();
        let blend = hash(tensors.iter().flat_map(|tensor| bits(&tensor.blended.memory)));
        let nine: Vec<Tensor<T>> = [65_537, 1000].map(|len| Tensor::random(&mut random, len, 9, 0, 0)).into();
        let config = Config { threads: 2, ..Config::new(9) };
        let (blended, saved) = step(face, config, &nine)?;
        let saved = version_1(&saved, 9).into_iter().map(u32::from);
        Ok(Golden { sums, blend, nine: [hash(saved), hash(blended.into_iter().flatten())] })
    }
    let got = [run::<f32>(face)?, run::<f16>(face)?, run::<bf16>(face)?];
    assert_eq!(got, GOLDEN[usize::from(face.cuda)], "{got:#x?}");
    Ok(())
}

/// FNV-1a.
fn hash(numbers: impl Iterator<Item = u32>) -> u64 {
    numbers.fold(0xcbf2_9ce4_8422_2325, |h, x| (h ^ u64::from(x)).wrapping_mul(0x0100_0000_01b3))
}

#[derive(Debug, PartialEq)]
struct Golden {
    /// Pending sums after DOT + BLEND of three modalities.
    sums: [u64; 6],
    /// Hash of that blend.
    blend: u64,
    /// After a step of nine, more than one tile reads: hashes of the saved state and of the blend.
    nine: [u64; 2],
}

/// Of the CPU, then of every GPU; each of f32, f16 and bf16. A GPU adds the sums in another order than the CPU, and its
/// blend rounds once for a multiplication and an addition.
#[rustfmt::skip]
const GOLDEN: [[Golden; 3]; 2] = [[
    Golden {
        sums: [0x4065_2a53_e702_0000, 0xc064_eafa_9f0e_0000, 0x4061_f05a_0c74_0000,
               0xc065_62e0_18cc_0000, 0x4049_830d_73fe_0000, 0xc067_b253_4bc8_0000],
        blend: 0x2e08_b864_5c48_0679,
        nine: [0x03dd_f8fb_8ac0_1a08, 0x12bf_d6b0_1504_5e5c],
    },
    Golden {
        sums: [0x4065_2a4b_48d4_0000, 0xc064_eafe_9f60_0000, 0x4061_f06c_d114_0000,
               0xc065_6304_02c4_0000, 0x4049_8522_4ce0_0000, 0xc067_b2b0_0790_0000],
        blend: 0xb683_5c7f_4fcc_9796,
        nine: [0x30be_4e11_8af8_527c, 0x28cc_1717_d197_fe38],
    },
    Golden {
        sums: [0x4065_2e46_2c68_0000, 0xc064_e8dc_2750_0000, 0x4061_ee27_d580_0000,
               0xc065_6e3f_c590_0000, 0x4049_8a2d_0bc0_0000, 0xc067_b744_0b30_0000],
        blend: 0x283c_1ac1_ec3b_b7a7,
        nine: [0x2ba5_9777_e3e1_6f03, 0x65ec_45ad_1f3d_6066],
    },
], [
    Golden {
        sums: [0x4065_2a54_00c3_4000, 0xc064_eafa_6500_c000, 0x4061_f059_f9b0_8000,
               0xc065_62df_d14b_8000, 0x4049_830c_b578_0000, 0xc067_b253_0ca3_0000],
        blend: 0xbcde_add9_3d8a_0666,
        nine: [0x9745_db15_df1b_c9fb, 0x44ee_46f4_dd83_96e3],
    },
    Golden {
        sums: [0x4065_2a4a_e9bc_0000, 0xc064_eafe_f198_0000, 0x4061_f06c_a4e0_0000,
               0xc065_6304_0483_0000, 0x4049_8522_9c80_0000, 0xc067_b2b0_02b8_0000],
        blend: 0x2bb5_a791_4b45_15d8,
        nine: [0x2d91_d562_be26_be3d, 0x736a_a697_92ca_1f21],
    },
    Golden {
        sums: [0x4065_2e46_3120_0000, 0xc064_e8dc_22b8_0000, 0x4061_ee27_cf50_0000,
               0xc065_6e3f_94c0_0000, 0x4049_8a2d_8f00_0000, 0xc067_b743_ede0_0000],
        blend: 0xb6ca_4b4a_445a_9e52,
        nine: [0x7bc0_0316_fde7_bfbf, 0x67d9_6326_ac7b_3652],
    },
]];
