//! `step`, plans, determinism, golden bits.

mod common;

use common::{Outcome, Random, STREAM, Sample, Tensor, bits, bits64, blender, pending};
use gradblend::{Blender, Cadence, Config, Device, Error, Pass, TensorGrads, bf16, f16};

each_dtype!(
    step_is_dot_blend_observe,
    threads_change_no_bit,
    permuting_modalities_permutes_weights,
    released_and_updated
);

fn lists<T: Sample>(random: &mut Random, k: usize) -> Vec<Tensor<T>> {
    (0..12).map(|i| Tensor::random(random, [0, 1, 700, 70_000][i % 4], k, i % 3, 4)).collect()
}

fn step_is_dot_blend_observe<T: Sample>() -> Outcome {
    let mut random = Random(21);
    for cadence in [Cadence::OnRequest, Cadence::EveryObservation] {
        for k in [1, 3, 4, 6] {
            let config = Config { cadence, ..Config::new(k as u32) };
            let (mut one, mut three) = (Blender::new(&Device::cpu(), config)?, Blender::new(&Device::cpu(), config)?);
            for _ in 0..4 {
                let mut fused = lists::<T>(&mut random, k);
                let mut apart = fused.clone();
                let grads: Vec<TensorGrads<'_>> = fused.iter_mut().map(Tensor::grads).collect();
                let plan = one.plan(&grads)?;
                one.step(&plan, STREAM())?;
                let grads: Vec<TensorGrads<'_>> = apart.iter_mut().map(Tensor::grads).collect();
                let plan = three.plan(&grads)?;
                three.dot(&plan, STREAM())?;
                three.blend(&plan, STREAM())?;
                three.observe(STREAM())?;
                for (fused, apart) in fused.iter().zip(&apart) {
                    assert_eq!(bits(&fused.blended), bits(&apart.blended), "K = {k}");
                }
                assert_eq!(one.save(STREAM())?, three.save(STREAM())?, "K = {k}");
            }
        }
    }
    Ok(())
}

fn threads_change_no_bit<T: Sample>() -> Outcome {
    let mut random = Random(22);
    let tensors = lists::<T>(&mut random, 5);
    let mut want = None;
    for threads in [1, 0, 2, 5] {
        let mut blender = blender(5, threads)?;
        let mut own = tensors.clone();
        let grads: Vec<TensorGrads<'_>> = own.iter_mut().map(Tensor::grads).collect();
        let plan = blender.plan(&grads)?;
        blender.step(&plan, STREAM())?;
        drop((plan, grads));
        let blended: Vec<Vec<u32>> = own.iter().map(|tensor| bits(&tensor.blended)).collect();
        let got = (blended, blender.save(STREAM())?);
        assert_eq!(&got, want.get_or_insert_with(|| got.clone()), "{threads} threads");
    }
    Ok(())
}

fn permuting_modalities_permutes_weights<T: Sample>() -> Outcome {
    let mut random = Random(23);
    let order = [2, 0, 3, 1];
    let (mut straight, mut permuted) = (blender(4, 1)?, blender(4, 1)?);
    for _ in 0..6 {
        let mut tensor = Tensor::<T>::random(&mut random, 2000, 4, 0, 0);
        let mut other = tensor.clone();
        other.modalities = order.iter().map(|k| tensor.modalities[*k].clone()).collect();
        let plan = straight.plan(&[tensor.grads()])?;
        straight.step(&plan, STREAM())?;
        let plan = permuted.plan(&[other.grads()])?;
        permuted.step(&plan, STREAM())?;
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
fn released_and_updated<T: Sample>() -> Outcome {
    let mut random = Random(24);
    let (mut reused, mut fresh) = (blender(2, 1)?, blender(2, 1)?);
    let mut plan = None;
    for turn in 0..4 {
        let mut tensors: Vec<Tensor<T>> = (0..3).map(|i| Tensor::random(&mut random, 500 * i, 2, turn, 2)).collect();
        let mut twins = tensors.clone();
        let grads: Vec<TensorGrads<'_>> = tensors.iter_mut().map(Tensor::grads).collect();
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
        let grads: Vec<TensorGrads<'_>> = twins.iter_mut().map(Tensor::grads).collect();
        let whole = fresh.plan(&grads)?;
        fresh.step(&whole, STREAM())?;
        drop(whole);
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
    let (mut safe, mut raw) = (blender(3, 1)?, blender(3, 1)?);
    let plan = safe.plan(&[tensor.grads()])?;
    safe.step(&plan, STREAM())?;
    drop(plan);
    let address = |list: &Vec<f32>| list[1..].as_ptr().cast::<std::ffi::c_void>();
    let modalities: Vec<_> = twin.modalities.iter().map(|v| v.as_ref().map_or(std::ptr::null(), address)).collect();
    let (train, valid) = (address(&twin.train), address(&twin.valid));
    let blended = twin.blended[1..].as_mut_ptr().cast();
    // SAFETY: 3,000 elements from the second on in each list, alive and untouched until the plan is dropped.
    let grads = unsafe { TensorGrads::from_raw(3000, gradblend::DType::F32, train, valid, &modalities, blended) };
    let plan = raw.plan(&[grads])?;
    raw.step(&plan, STREAM())?;
    drop(plan);
    assert_eq!(bits(&twin.blended), bits(&tensor.blended));
    assert_eq!(raw.save(STREAM())?, safe.save(STREAM())?);
    Ok(())
}

/// A sharded trainer: each shard does DOT + BLEND, the pending sums are added up, then observed.
#[test]
fn shards_add_their_pending_sums() -> Outcome {
    let mut random = Random(26);
    let mut tensors: Vec<Tensor<f32>> = (0..4).map(|_| Tensor::random(&mut random, 3000, 2, 0, 0)).collect();
    let (mut first, mut second) = (blender(2, 1)?, blender(2, 1)?);
    for (blender, shard) in [&mut first, &mut second].into_iter().zip(tensors.chunks_mut(2)) {
        let grads: Vec<TensorGrads<'_>> = shard.iter_mut().map(Tensor::grads).collect();
        let plan = blender.plan(&grads)?;
        blender.pass(&plan, Pass::DOT | Pass::BLEND, STREAM())?;
    }
    let sums: Vec<f64> = pending(&first).iter().zip(pending(&second)).map(|(a, b)| a + b).collect();
    common::set_pending(&mut first, &sums[..2], &sums[2..]);
    first.observe(STREAM())?;
    common::Sums::of(2, &tensors).check(&sums, "two shards");
    assert_eq!(first.report(STREAM())?.mean.len(), 2);
    Ok(())
}

/// Fixed inputs, exact output bits: pending sums after dot, then a hash of the blend. A change here is a change of results
/// that users must be told of.
#[test]
fn golden_bits() -> Outcome {
    fn run<T: Sample>() -> Result<(Vec<u64>, u64), Box<dyn std::error::Error>> {
        let mut random = Random(2020);
        let mut tensors: Vec<Tensor<T>> =
            [(1, 0), (1000, 1), (65_537, 2)].map(|(len, offset)| Tensor::random(&mut random, len, 3, offset, 0)).into();
        tensors[1].modalities[1] = None;
        let mut blender = blender(3, 0)?;
        blender.set_weights(&[0.5, 0.3, 0.2], STREAM())?;
        let grads: Vec<TensorGrads<'_>> = tensors.iter_mut().map(Tensor::grads).collect();
        let plan = blender.plan(&grads)?;
        blender.pass(&plan, Pass::DOT | Pass::BLEND, STREAM())?;
        drop((plan, grads));
        // FNV-1a over the bits of the blend.
        let blended = tensors.iter().flat_map(|tensor| bits(&tensor.blended));
        let hash = blended.fold(0xcbf2_9ce4_8422_2325_u64, |h, x| (h ^ u64::from(x)).wrapping_mul(0x0100_0000_01b3));
        Ok((bits64(&pending(&blender)), hash))
    }
    assert_eq!(run::<f32>()?, golden::F32.pair());
    assert_eq!(run::<f16>()?, golden::F16.pair());
    assert_eq!(run::<bf16>()?, golden::BF16.pair());
    Ok(())
}

mod golden {
    pub(crate) struct Golden(pub(crate) [u64; 6], pub(crate) u64);

    impl Golden {
        pub(crate) fn pair(&self) -> (Vec<u64>, u64) {
            (self.0.to_vec(), self.1)
        }
    }

    pub(crate) const F32: Golden = Golden(
        [
            0x4065_2a53_e702_0000,
            0xc064_eafa_9f0e_0000,
            0x4061_f05a_0c74_0000,
            0xc065_62e0_18cc_0000,
            0x4049_830d_73fe_0000,
            0xc067_b253_4bc8_0000,
        ],
        0x2e08_b864_5c48_0679,
    );
    pub(crate) const F16: Golden = Golden(
        [
            0x4065_2a4b_48d4_0000,
            0xc064_eafe_9f60_0000,
            0x4061_f06c_d114_0000,
            0xc065_6304_02c4_0000,
            0x4049_8522_4ce0_0000,
            0xc067_b2b0_0790_0000,
        ],
        0xb683_5c7f_4fcc_9796,
    );
    pub(crate) const BF16: Golden = Golden(
        [
            0x4065_2e46_2c68_0000,
            0xc064_e8dc_2750_0000,
            0x4061_ee27_d580_0000,
            0xc065_6e3f_c590_0000,
            0x4049_8a2d_0bc0_0000,
            0xc067_b744_0b30_0000,
        ],
        0x283c_1ac1_ec3b_b7a7,
    );
}
