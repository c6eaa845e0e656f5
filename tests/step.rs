//! `step`, plans, determinism, golden bits.

mod common;

use std::ffi::c_void;

use common::{Outcome, Place, Random, STREAM, Sample, Target, Tensor, bits, bits64};
use gradblend::{Blender, Cadence, Config, Error, Pass, TensorGrads, bf16, f16};

tests! {
    each_dtype:
        step_is_dot_blend_observe,
        threads_change_no_bit,
        alignment_changes_no_bit,
        permuting_modalities_permutes_weights,
        released_and_updated;
    once:
        shards_add_their_pending_sums,
        golden_bits;
}

fn lists<T: Sample>(random: &mut Random, k: usize) -> Vec<Tensor<T>> {
    (0..12).map(|i| Tensor::random(random, [0, 1, 700, 70_000][i % 4], k, i % 3, 4)).collect()
}

fn step_is_dot_blend_observe<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(21);
    for cadence in [Cadence::OnRequest, Cadence::EveryObservation] {
        for (k, turns) in [(1, 4), (3, 4), (4, 4), (6, 2), (9, 2), (12, 2)] {
            let config = Config { cadence, ..Config::new(k as u32) };
            let (mut one, mut three) = (place.blender_with(config)?, place.blender_with(config)?);
            for _ in 0..turns {
                let mut fused = lists::<T>(&mut random, k);
                for (i, tensor) in fused.iter_mut().enumerate() {
                    tensor.dots = i % 6 != 5;
                    // In place too, where the modality is there.
                    let over = random.below(k);
                    if i % 2 == 1 && tensor.modalities[over].is_some() {
                        tensor.target = Target::Modality(over);
                    }
                }
                let mut apart = fused.clone();
                place.run(&mut one, &mut fused, Blender::step)?;
                place.run(&mut three, &mut apart, |blender, plan, stream| {
                    blender.dot(plan, stream)?;
                    blender.blend(plan, stream)?;
                    blender.observe(stream)
                })?;
                for (fused, apart) in fused.iter().zip(&apart) {
                    assert_eq!(bits(fused.target()), bits(apart.target()), "K = {k}");
                }
                assert_eq!(one.save(STREAM())?, three.save(STREAM())?, "K = {k}");
            }
            assert_eq!(one.report(STREAM())?.skipped, 0);
        }
    }
    Ok(())
}

/// The blend and the saved state after a step.
fn step<T: Sample>(place: Place, config: Config, tensors: &[Tensor<T>]) -> gradblend::Result<(Vec<Vec<u32>>, Vec<u8>)> {
    let mut blender = place.blender_with(config)?;
    let mut own = tensors.to_vec();
    place.run(&mut blender, &mut own, Blender::step)?;
    Ok((own.iter().map(|tensor| bits(&tensor.blended)).collect(), blender.save(STREAM())?))
}

/// On a device, where there are none to choose, the same bits each time.
fn threads_change_no_bit<T: Sample>(place: Place) -> Outcome {
    let tensors = lists::<T>(&mut Random(22), 5);
    let config = Config::new(5);
    let want = step(place, Config { threads: 1, ..config }, &tensors)?;
    for threads in [0, 2, 5] {
        assert_eq!(step(place, Config { threads, ..config }, &tensors)?, want, "{threads} threads");
    }
    Ok(())
}

fn alignment_changes_no_bit<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(27);
    let config = Config { threads: 2, ..Config::new(9) };
    let aligned: Vec<Tensor<T>> = [70_000, 8000, 33].map(|len| Tensor::random(&mut random, len, 9, 0, 0)).into();
    let want = step(place, config, &aligned)?;
    for _ in 0..4 {
        let scattered: Vec<Tensor<T>> = aligned.iter().map(|tensor| tensor.scattered(&mut random)).collect();
        assert_eq!(step(place, config, &scattered)?, want);
    }
    Ok(())
}

fn permuting_modalities_permutes_weights<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(23);
    let order = [2, 0, 3, 1];
    let (mut straight, mut permuted) = (place.blender(4)?, place.blender(4)?);
    for _ in 0..6 {
        let mut tensors = [Tensor::<T>::random(&mut random, 2000, 4, 0, 0)];
        let mut others = tensors.clone();
        others[0].modalities = order.iter().map(|k| tensors[0].modalities[*k].clone()).collect();
        place.run(&mut straight, &mut tensors, Blender::step)?;
        place.run(&mut permuted, &mut others, Blender::step)?;
    }
    straight.reweight(STREAM())?;
    permuted.reweight(STREAM())?;
    let (straight, permuted) = (straight.report(STREAM())?, permuted.report(STREAM())?);
    for (k, from) in order.into_iter().enumerate() {
        assert_eq!(permuted.mean[k], straight.mean[from]);
        assert_eq!(permuted.second_moment[k], straight.second_moment[from]);
        assert!((permuted.weights[k] - straight.weights[from]).abs() < 1e-14);
    }
    Ok(())
}

/// A loop that reads `blended` between steps: release gives the slices back, update binds others.
fn released_and_updated<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(24);
    let (mut reused, mut fresh) = (place.blender(2)?, place.blender(2)?);
    let mut plan = None;
    for turn in 0..4 {
        let mut tensors: Vec<Tensor<T>> = (0..3).map(|i| Tensor::random(&mut random, 500 * i, 2, turn, 2)).collect();
        let mut twins = tensors.clone();
        let mut lists = place.put(&mut tensors);
        let grads = lists.grads();
        let bound = match plan.take() {
            None => reused.plan(&grads)?,
            Some(released) => {
                assert_eq!(reused.step(&released, STREAM()), Err(Error::ReleasedPlan));
                let mut bound: gradblend::Plan<'_> = released;
                bound.update(&grads, STREAM())?;
                bound
            }
        };
        reused.step(&bound, STREAM())?;
        plan = Some(bound.release());
        drop(grads);
        lists.fetch();
        place.run(&mut fresh, &mut twins, Blender::step)?;
        for (tensor, twin) in tensors.iter().zip(&twins) {
            assert_eq!(bits(&tensor.blended), bits(&twin.blended));
        }
    }
    assert_eq!(reused.save(STREAM())?, fresh.save(STREAM())?);
    Ok(())
}

/// Raw addresses do what slices do.
#[test]
fn raw_addresses() -> Outcome {
    let mut random = Random(25);
    let mut tensor = Tensor::<f32>::random(&mut random, 3000, 3, 1, 0);
    tensor.modalities[1] = None;
    let mut twin = tensor.clone();
    let (mut safe, mut raw) = (Place::Cpu.blender(3)?, Place::Cpu.blender(3)?);
    Place::Cpu.run(&mut safe, std::slice::from_mut(&mut tensor), Blender::step)?;
    let address = |list: &[f32]| list.as_ptr().cast::<c_void>();
    let modalities: Vec<_> = twin.modalities.iter().map(|v| v.as_deref().map_or(std::ptr::null(), address)).collect();
    let (train, valid) = (address(&twin.train), address(&twin.valid));
    let blended = twin.blended.as_mut_ptr().cast();
    // SAFETY: 3,000 elements in each list, alive and untouched until the plan is dropped.
    let grads = unsafe { TensorGrads::from_raw(3000, gradblend::DType::F32, train, valid, &modalities, blended) };
    let plan = raw.plan(&[grads])?;
    raw.step(&plan, STREAM())?;
    drop(plan);
    assert_eq!(bits(&twin.blended), bits(&tensor.blended));
    assert_eq!(raw.save(STREAM())?, safe.save(STREAM())?);
    Ok(())
}

/// A sharded trainer: each shard does DOT + BLEND, the pending sums are added up, then observed.
fn shards_add_their_pending_sums(place: Place) -> Outcome {
    let mut random = Random(26);
    let mut tensors: Vec<Tensor<f32>> = (0..4).map(|_| Tensor::random(&mut random, 3000, 2, 0, 0)).collect();
    let (mut first, mut second) = (place.blender(2)?, place.blender(2)?);
    for (blender, shard) in [&mut first, &mut second].into_iter().zip(tensors.chunks_mut(2)) {
        place.run(blender, shard, |blender, plan, stream| blender.pass(plan, Pass::DOT | Pass::BLEND, stream))?;
    }
    let sums: Vec<f64> = place.pending(&first).iter().zip(place.pending(&second)).map(|(a, b)| a + b).collect();
    place.set_pending(&mut first, &sums[..2], &sums[2..]);
    first.observe(STREAM())?;
    common::Sums::of(2, &tensors).check(&sums, "two shards");
    assert_eq!(first.report(STREAM())?.mean, sums[..2]);
    Ok(())
}

/// Fixed inputs, exact output bits. A change here is a change of results that users must be told of.
fn golden_bits(place: Place) -> Outcome {
    fn run<T: Sample>(place: Place) -> Result<Golden, Box<dyn std::error::Error>> {
        let mut random = Random(2020);
        let mut tensors: Vec<Tensor<T>> =
            [(1, 0), (1000, 1), (65_537, 2)].map(|(len, offset)| Tensor::random(&mut random, len, 3, offset, 0)).into();
        tensors[1].modalities[1] = None;
        let mut blender = place.blender(3)?;
        blender.set_weights(&[0.5, 0.3, 0.2], STREAM())?;
        place.run(&mut blender, &mut tensors, |blender, plan, stream| {
            blender.pass(plan, Pass::DOT | Pass::BLEND, stream)
        })?;
        let sums = bits64(&place.pending(&blender)).try_into().unwrap_or_default();
        let blend = hash(tensors.iter().flat_map(|tensor| bits(&tensor.blended.memory)));
        let nine: Vec<Tensor<T>> = [65_537, 1000].map(|len| Tensor::random(&mut random, len, 9, 0, 0)).into();
        let config = Config { threads: 2, ..Config::new(9) };
        let (blended, saved) = step(place, config, &nine)?;
        Ok(Golden { sums, blend, nine: [hash(saved.into_iter().map(u32::from)), hash(blended.into_iter().flatten())] })
    }
    let got = [run::<f32>(place)?, run::<f16>(place)?, run::<bf16>(place)?];
    let want = match place {
        Place::Cpu => CPU,
        #[cfg(feature = "cuda")]
        Place::Cuda => CUDA,
    };
    assert_eq!(got, want, "{got:#x?}");
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
    /// After a step of nine, more than are read at a time: hashes of the saved state and of the blend.
    nine: [u64; 2],
}

/// Of f32, f16 and bf16.
const CPU: [Golden; 3] = [
    Golden {
        sums: [
            0x4065_2a53_e702_0000,
            0xc064_eafa_9f0e_0000,
            0x4061_f05a_0c74_0000,
            0xc065_62e0_18cc_0000,
            0x4049_830d_73fe_0000,
            0xc067_b253_4bc8_0000,
        ],
        blend: 0x2e08_b864_5c48_0679,
        nine: [0x03dd_f8fb_8ac0_1a08, 0x12bf_d6b0_1504_5e5c],
    },
    Golden {
        sums: [
            0x4065_2a4b_48d4_0000,
            0xc064_eafe_9f60_0000,
            0x4061_f06c_d114_0000,
            0xc065_6304_02c4_0000,
            0x4049_8522_4ce0_0000,
            0xc067_b2b0_0790_0000,
        ],
        blend: 0xb683_5c7f_4fcc_9796,
        nine: [0x30be_4e11_8af8_527c, 0x28cc_1717_d197_fe38],
    },
    Golden {
        sums: [
            0x4065_2e46_2c68_0000,
            0xc064_e8dc_2750_0000,
            0x4061_ee27_d580_0000,
            0xc065_6e3f_c590_0000,
            0x4049_8a2d_0bc0_0000,
            0xc067_b744_0b30_0000,
        ],
        blend: 0x283c_1ac1_ec3b_b7a7,
        nine: [0x2ba5_9777_e3e1_6f03, 0x65ec_45ad_1f3d_6066],
    },
];

/// The same for every GPU. Sums are added up in another order than on the CPU, and the blend multiplies and adds in one
/// rounding.
#[cfg(feature = "cuda")]
const CUDA: [Golden; 3] = [
    Golden {
        sums: [
            0x4065_2a54_00c3_4000,
            0xc064_eafa_6500_c000,
            0x4061_f059_f9b0_8000,
            0xc065_62df_d14b_8000,
            0x4049_830c_b578_0000,
            0xc067_b253_0ca3_0000,
        ],
        blend: 0xbcde_add9_3d8a_0666,
        nine: [0x9745_db15_df1b_c9fb, 0x44ee_46f4_dd83_96e3],
    },
    Golden {
        sums: [
            0x4065_2a4a_e9bc_0000,
            0xc064_eafe_f198_0000,
            0x4061_f06c_a4e0_0000,
            0xc065_6304_0483_0000,
            0x4049_8522_9c80_0000,
            0xc067_b2b0_02b8_0000,
        ],
        blend: 0x2bb5_a791_4b45_15d8,
        nine: [0x2d91_d562_be26_be3d, 0x736a_a697_92ca_1f21],
    },
    Golden {
        sums: [
            0x4065_2e46_3120_0000,
            0xc064_e8dc_22b8_0000,
            0x4061_ee27_cf50_0000,
            0xc065_6e3f_94c0_0000,
            0x4049_8a2d_8f00_0000,
            0xc067_b743_ede0_0000,
        ],
        blend: 0xb6ca_4b4a_445a_9e52,
        nine: [0x7bc0_0316_fde7_bfbf, 0x67d9_6326_ac7b_3652],
    },
];
