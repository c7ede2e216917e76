// The activations of a SIMD register: their values, and the gradient before them from the one after them. Each is a
// type, so that a kernel is compiled for each. `smooth`: it costs as much as some memory accesses.
#pragma once
#include "convolution.h"
#include "cpu/vec_math.h"

namespace aeup {
namespace AEUP_ISA {

template <class S>
struct Identity {
  static constexpr bool smooth = false;
  template <class V>
  V value(V z) const {
    return z;
  }
  template <class V>
  V gradient(V, V grad) const {
    return grad;
  }
};
template <class S>
struct Relu {
  static constexpr bool smooth = false;
  template <class V>
  V value(V z) const {
    return z < S(0) ? V{} : z;
  }
  template <class V>
  V gradient(V z, V grad) const {
    return z <= S(0) ? V{} : grad;
  }
};
template <class S>
struct LeakyRelu {
  static constexpr bool smooth = false;
  S slope;
  template <class V>
  V value(V z) const {
    return z < S(0) ? z * slope : z;
  }
  template <class V>
  V gradient(V z, V grad) const {
    return z > S(0) ? grad : grad * slope;
  }
};
template <class S>
struct Silu {
  static constexpr bool smooth = true;
  template <class V>
  V value(V z) const {
    return z * vlogistic(z);
  }
  template <class V>
  V gradient(V z, V grad) const {
    const V s = vlogistic(z);
    return grad * (s + z * s * (S(1) - s));
  }
};
template <class S>
struct Gelu {
  static constexpr bool smooth = true;
  template <class V>
  V value(V z) const {
    return S(0.5) * z * (S(1) + verf(z * S(0.70710678118654752440)));
  }
  template <class V>
  V gradient(V z, V grad) const {
    return grad * (S(0.5) * (S(1) + verf(z * S(0.70710678118654752440))) + z * normal_density(z));
  }
};
template <class S>
struct Tanh {
  static constexpr bool smooth = true;
  template <class V>
  V value(V z) const {
    return vtanh(z);
  }
  template <class V>
  V gradient(V z, V grad) const {
    const V t = vtanh(z);
    return grad * (S(1) - t * t);
  }
};
template <class S>
struct Sigmoid {
  static constexpr bool smooth = true;
  template <class V>
  V value(V z) const {
    return vlogistic(z);
  }
  template <class V>
  V gradient(V z, V grad) const {
    const V s = vlogistic(z);
    return grad * (s * (S(1) - s));
  }
};

// f(the activation): S is the arithmetic type.
template <class S, class F>
void with_activation(Activation kind, double slope, F f) {
  switch (kind) {
    case Activation::none: return f(Identity<S>());
    case Activation::relu: return f(Relu<S>());
    case Activation::leaky_relu: return f(LeakyRelu<S>{S(slope)});
    case Activation::silu: return f(Silu<S>());
    case Activation::gelu: return f(Gelu<S>());
    case Activation::tanh: return f(Tanh<S>());
    case Activation::sigmoid: return f(Sigmoid<S>());
  }
}

}  // namespace AEUP_ISA
}  // namespace aeup
